"""Edge detectors, stations, heatmaps and boxes."""
