"""A study: a grid of ordinary training runs, a measurement of each, one table, one figure."""
