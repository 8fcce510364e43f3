"""Tensor programs: representation, import, interpreters, equivalence checks, lowering, timing."""
