"""Data: rows of a source, their texts and tokens, and the population that holds them."""

from fedhpc.data.load import Data, divided_again, load_data
from fedhpc.data.population import Population, describe
from fedhpc.data.tokens import Examples, group_references

__all__ = ["Data", "Examples", "Population", "describe", "divided_again", "group_references", "load_data"]
