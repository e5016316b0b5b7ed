"""Where stream state lives: slots on the device, host memory behind them; the seam for durable storage."""
