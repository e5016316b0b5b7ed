"""What is measured of a stream: signals per request, moving averages per stream."""
