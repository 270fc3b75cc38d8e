// Newer pieces of the C++ library, compiled into this one: it must load where only those of manylinux_2_28 are found
// (GLIBCXX 3.4.25, GLIBC 2.28), whatever compiler built it. tests/native/test_binary.py looks at the result.

#include <new>
#include <sstream>

// GLIBCXX 3.4.26: constructors without arguments, which torch's headers call.
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

// GLIBCXX 3.4.29.
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// GLIBC 2.32. False: std::shared_ptr counts with atomic operations, which is right with and without threads.
extern "C" {
char __libc_single_threaded = 0;
}
