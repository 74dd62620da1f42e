"""Audits: comparing Traces, explaining what differs, and judging it. Imports engine, reference and goldens."""
