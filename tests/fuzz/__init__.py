# SPDX-License-Identifier: Apache-2.0
"""Fuzzing of all code that parses input from outside. Short runs are unit tests; start long runs by hand."""
