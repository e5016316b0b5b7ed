"""The wire: routes by topic, bodies to tensors and back, errors to status codes."""
