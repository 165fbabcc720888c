"""Frozen base models: decoder-only language models, encoders and encoder-decoders.

A class of `base.Base` for each says how texts become rows of tokens, what the network computes from a batch of them,
and how it answers: labels and texts. What the loss of a batch is belongs to fedhpc.objectives.
"""
