"""Outlier detection: tabular detectors as shared plans of tensor operators (TOD) and outlier nodes in graphs (BOND)."""
