"""Equality graphs: many equal terms at once, rules as tables, congruence closure."""
