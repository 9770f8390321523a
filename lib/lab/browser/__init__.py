"""The page that plays: model, sampler and piano in one HTML file, for any browser."""
