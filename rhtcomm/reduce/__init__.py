"""Means over ranks through compressed payloads."""

from rhtcomm.reduce.agreement import DisagreementError, check_agreement
from rhtcomm.reduce.collectives import all_reduce, all_reduce_many, reduce_scatter
from rhtcomm.reduce.feedback import check_error_feedback
from rhtcomm.reduce.reducer import Reducer, Report, Treatment
from rhtcomm.reduce.split import (
    Algorithm,
    check_algorithm,
    choose_algorithm,
    split_into_chunks,
    split_into_shards,
)

__all__ = [
    "Algorithm",
    "DisagreementError",
    "Reducer",
    "Report",
    "Treatment",
    "all_reduce",
    "all_reduce_many",
    "check_agreement",
    "check_algorithm",
    "check_error_feedback",
    "choose_algorithm",
    "reduce_scatter",
    "split_into_chunks",
    "split_into_shards",
]
