"""A synthetic slide with a known truth, and the program that makes more of them."""
