"""Helpers of the tests: small real models, bundles built from stored exports, recorded results, and servers."""
