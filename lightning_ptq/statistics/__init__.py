"""Statistics tuning: batch-norm re-estimation, para-normalization, bias tuning."""
