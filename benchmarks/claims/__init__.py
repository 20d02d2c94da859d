"""Claims, member by member: method and baselines over seeds, with a verdict."""
