"""Router: predicts the depth a query needs from its embedding. Labels, fitting and evaluation live here."""
