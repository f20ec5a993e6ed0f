"""What is done when a domain is defined, planned and started, and undone when it ends.

define.py provisions and places, plan.py decides without changing anything, start.py freezes and puts away.
"""
