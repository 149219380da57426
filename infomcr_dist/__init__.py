"""Distributed training towards flatter minima: the regularizer and the metric of Jia & Su (ICML 2020)."""

from infomcr_dist.regularizer import regularized_backward

__all__ = ["regularized_backward"]
