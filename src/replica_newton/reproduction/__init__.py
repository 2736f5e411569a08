"""Replication of Arnold and Wang (2017)."""
