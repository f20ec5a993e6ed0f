"""Where the operator lets guests have persistent memory: rules and quotas, what is used, and how a pool is made.

rules.py decides which backing a domain may have.
"""
