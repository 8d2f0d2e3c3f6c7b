"""The forms of y[rows] += scale · (x[rows] Aᵀ) Bᵀ: reference, torch and native."""
