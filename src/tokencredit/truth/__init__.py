"""A known truth for anybody's estimators: what is exactly known of every token of some completions of the embedded
world, and how far an estimate of it is from there.
"""
