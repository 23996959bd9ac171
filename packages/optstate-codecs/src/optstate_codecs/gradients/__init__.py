"""What happens to gradients besides a rule: norm and clipping, centralization, release, hooks."""
