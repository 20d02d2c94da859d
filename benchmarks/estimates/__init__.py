"""Estimates, member by member: what compilers say of devices that are not here."""
