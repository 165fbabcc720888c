"""How the updates of a cohort combine: one file per rule.

LINEAR rules are sums of the updates and have `weights(shares, rates, client) -> (C,)` of the accepted clients: shares
(C,) of the planned cohort's weight (`server.weighting`), rates[i] the learning rate of each local step of client i,
client the section of the configuration. The others have `combine(updates, shares, options) -> (chunk,)`, updates being
(C, chunk).
"""
