// Query rows packed transposed for the inner loops: a panel holds, for every step along the embedding dimension, one
// unit of up to widest_panel vectors of rows. Rows of several queries share panels; what does not count is left out.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_forward.h"

namespace jmlr::maxsim::cpu {

// Queries [first, last) with their panels.
struct Group {
    int64_t first = 0;
    int64_t last = 0;
    int64_t rows = 0;          // kept query tokens
    int64_t vectors = 0;       // that hold them
    int64_t panel_offset = 0;  // of the first panel, in units
};

class QueryPanels {
public:
    QueryPanels(const Problem& problem, const Instructions& instructions) : p(problem), set(instructions) {
        pairs = meets_pairs(p);
        steps = pairs ? (p.dimension + 1) / 2 : p.dimension;
    }

    // Groups of so many queries, with room for the rows that `keeps(i, r)`.
    template <class Keeps>
    void make_groups(int64_t queries_per_group, const Keeps& keeps) {
        row_begin.resize(p.query_count + 1);
        for (int64_t i = 0; i < p.query_count; ++i) {
            row_begin[i] = static_cast<int64_t>(row_token.size());
            for (int64_t r = 0; r < p.query_length; ++r) {
                if (keeps(i, r)) row_token.push_back(static_cast<int32_t>(r));
            }
        }
        row_begin[p.query_count] = static_cast<int64_t>(row_token.size());
        int64_t offset = 0;
        for (int64_t first = 0; first < p.query_count; first += queries_per_group) {
            Group group;
            group.first = first;
            group.last = std::min(first + queries_per_group, p.query_count);
            group.rows = row_begin[group.last] - row_begin[group.first];
            group.vectors = (group.rows + set.lanes - 1) / set.lanes;
            group.panel_offset = offset;
            offset += group.vectors * set.lanes * steps;
            groups.push_back(group);
            most_vectors = std::max(most_vectors, group.vectors);
        }
        panels = Scratch<uint32_t>(offset);
    }

    // A row's units, in order: floats, or with `pairs` the embedding as it is stored.
    void put(const Group& group, int64_t row, const char* units) const {
        if (steps == 0) return;
        uint32_t* place = &unit(group, row, 0);
        const int64_t stride = steps > 1 ? &unit(group, row, 1) - place : 0;
        const int64_t whole = steps - (half_step() ? 1 : 0);
        for (int64_t s = 0; s < whole; ++s) std::memcpy(place + s * stride, units + s * 4, 4);
        if (half_step()) {
            uint16_t last;
            std::memcpy(&last, units + whole * 4, 2);
            place[whole * stride] = last;
        }
    }

    // Lanes behind a group's last row, which nobody looks at.
    void clear_rest(const Group& group) const {
        for (int64_t row = group.rows; row < group.vectors * set.lanes; ++row) {
            for (int64_t s = 0; s < steps; ++s) unit(group, row, s) = 0;
        }
    }

    int64_t panel_rows() const { return int64_t{widest_panel} * set.lanes; }
    // The panel that starts with this row of the group, and how many vectors it has.
    const uint32_t* panel(const Group& group, int64_t row) const {
        return panels.get() + group.panel_offset + row * steps;
    }
    int vectors(const Group& group, int64_t row) const {
        return static_cast<int>(std::min(panel_rows(), group.vectors * set.lanes - row) / set.lanes);
    }
    bool half_step() const { return pairs && p.dimension % 2 != 0; }

    bool pairs = false;  // bfloat16 as it is; else units are floats
    int64_t steps = 0;
    int64_t most_vectors = 0;
    std::vector<int64_t> row_begin;  // [Nq + 1] into the kept query tokens of all queries
    std::vector<int32_t> row_token;  // [kept] position within the query
    std::vector<Group> groups;

private:
    // The place of step s of a group's row.
    uint32_t& unit(const Group& group, int64_t row, int64_t s) const {
        const int64_t width = panel_rows(), panel = row / width;
        const int64_t own = std::min(width, group.vectors * set.lanes - panel * width);
        return panels[group.panel_offset + panel * width * steps + s * own + row % width];
    }

    const Problem& p;
    const Instructions& set;
    Scratch<uint32_t> panels;
};

}  // namespace jmlr::maxsim::cpu
