"""Speed, claims and the demo: ``python -m benchmarks --help`` from the repository.

A member is one file in ``speed/`` or ``claims/`` with

- ``CLAIM``: what it measures, in one sentence;
- ``PRESETS``: ``{"small": Options(...), "full": Options(...)}``, frozen dataclasses;
- ``run(options, progress)``: yields one dict for each case, raw repetitions included;
- ``tables(records)``, ``draw(records)`` and ``verdict(records)``: what a reader sees,
  always computed from the records and never stored.

This file imports nothing: a process is pinned to its core before JAX wakes up.
"""
