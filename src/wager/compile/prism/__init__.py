"""Prism: searches families of programs symbolically, decides tilings and tile sizes later (arXiv 2604.15272)."""
