"""Devices whose speed and links are lognormal over the clients; with both sigmas 0 all devices are equal."""

from __future__ import annotations

import math

from pydantic import Field

from fedhpc.participation.devices.base import Device, Devices, Timed
from fedhpc.rng import generator


class Lognormal(Devices):
    """Each client draws its speed and its links once; up- and down-link vary together."""

    class Options(Timed):
        tokens_per_s: float = Field(1000.0, gt=0, description="median speed of local training")
        speed_sigma: float = Field(0.5, ge=0, description="standard deviation of the logarithm of the speed")
        down_bytes_per_s: float = Field(2.5e6, gt=0, description="median speed of the link to a client")
        up_bytes_per_s: float = Field(6e5, gt=0, description="median speed of the link from a client")
        link_sigma: float = Field(0.5, ge=0, description="standard deviation of the logarithm of both links")
        availability: float = Field(1.0, gt=0, le=1, description="probability that a client can be asked")

    def of(self, client: int) -> Device:
        options = self.options
        speed, link = generator(self.seed, "device", client).normal(size=2)
        speed, link = math.exp(options.speed_sigma * speed), math.exp(options.link_sigma * link)
        return Device(
            options.tokens_per_s * speed,
            options.down_bytes_per_s * link,
            options.up_bytes_per_s * link,
            options.availability,
        )

    @property
    def lowest_availability(self) -> float:
        return float(self.options.availability)
