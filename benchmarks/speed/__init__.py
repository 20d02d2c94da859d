"""Speed, member by member: interleaved timings against what a user would pick."""
