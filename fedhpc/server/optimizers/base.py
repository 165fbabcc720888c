"""A server optimizer turns the aggregated pseudo-gradient into the next global state.

A file has `Options` (server.lr is options.lr), `initial_state(size, options)` and
`step(theta, gradient, state, options) -> theta`, all vectors float64 (P,). The family is that of Reddi et al. 2021
(arXiv 2003.00295, algorithm 2), whose Delta_t is minus our pseudo-gradient.
"""
