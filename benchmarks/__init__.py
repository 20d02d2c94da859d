"""Speed, claims, estimates, demo: ``python -m benchmarks --help`` in the repository.

A member is one file in ``speed/``, ``claims/`` or ``estimates/`` with

- ``CLAIM``: what it measures, in one sentence;
- ``PRESETS``: ``{"small": Options(...), "full": Options(...)}``, frozen dataclasses;
- ``run(options, progress)``: yields one dict for each case, raw repetitions included;
  in an estimate, where nothing is run, also with the device to compile for;
- ``tables(records)``, ``draw(records)`` and ``verdict(records)``: what a reader sees,
  always computed from the records and never stored.

This file imports nothing: a process is pinned to its core before JAX wakes up.
"""
