"""How well a proxy agrees with an effect that is only known through noisy rollouts. numpy and scipy alone.

ranks       Spearman, Kendall's tau-b, AUROC, average precision, precision at k, partial correlation; under any weights
resampling  the bootstrap over prompts, for all of them at once; paired tests
rollouts    alternatives' rewards -> effects with exact variances, halves, thinning
moments     what is unbiased at any budget: noise-corrected correlation, captured share, reliability
posterior   P(|effect| ≥ τ | rollouts): soft labels, and the best that a perfect proxy could reach
controls    noise alone, permutation within completions, the budget curve
calibration predicted against realised success
"""
