"""What data says: calls, calibration, consumers, statistics, scores, losses."""
