"""Fuzzing of all code that parses input from outside. Short runs are unit tests; start long runs by hand."""
