"""How good the systems are: retrieval measures, intervals, paired tests, and the record each system leaves."""

from .results import Comparison, SummaryRow, SystemResult, comparison, summary_table
from .retrieval import ndcg_at_k, recall_at_k, reciprocal_rank, success_at_k
from .statistics import Interval, McNemar, PairedDifference, mcnemar, mean_interval, paired_difference

__all__ = [
    "Comparison",
    "Interval",
    "McNemar",
    "PairedDifference",
    "SummaryRow",
    "SystemResult",
    "comparison",
    "mcnemar",
    "mean_interval",
    "ndcg_at_k",
    "paired_difference",
    "recall_at_k",
    "reciprocal_rank",
    "success_at_k",
    "summary_table",
]
