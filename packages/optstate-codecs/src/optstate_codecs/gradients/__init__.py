"""Processing of gradients besides the rule: norm and clipping, centralization, release, hooks."""
