"""A light model of how much a token matters, learned from measured effects on a frozen policy's hidden states.

Its *size* is a score like any proxy: as the probability of `TokenSampling` it keeps the gradient unbiased, and it can
rank what a budget of re-sampling measures. Its sign needs the outcome, which is known where one trains.
"""
