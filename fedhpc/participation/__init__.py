"""Who trains when, with whom and where: sampling of clients, blocks of clients, schedules, and forecasts."""
