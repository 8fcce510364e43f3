"""Compile C++ once with the system compiler, remember it by content, load it."""
