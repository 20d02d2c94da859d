"""Failures of the library that the fuzz found; take a line away when it is mended.

Call -> what happens in place of a result or a ValueError -> argument, kind, label.
"""

_FOUND = {
    "circulant_factors": {
        "TypeError": [
            "block: count, 2.0",
            "block: count, '3'",
        ],
    },
    "dft_chain_factors": {
        "TypeError": [
            "radices: sequence, None",
            "radices: sequence, 3",
            "radices: sequence, 'text'",
        ],
    },
    "dft_factors": {
        "TypeError": [
            "n: count, None",
            "n: count, '3'",
            "nblocks: count, 2.0",
            "nblocks: count, None",
            "nblocks: count, '3'",
        ],
    },
    "factor_mmstar": {
        "TypeError": [
            "block: count, 2.0",
            "block: count, None",
            "block: count, '3'",
        ],
    },
    "fold_monarch_stack": {
        "TypeError": [
            "factors: tree, None",
        ],
    },
    "hadamard_factors": {
        "TypeError": [
            "n: count, 4.5",
            "n: count, 4.0",
            "n: count, None",
            "n: count, '3'",
            "n: count, nan",
            "nblocks: count, 2.0",
            "nblocks: count, None",
            "nblocks: count, '3'",
        ],
    },
    "init_monarch": {
        "TypeError": [
            "in_features: count, 6.5",
            "in_features: count, 6.0",
            "in_features: count, None",
            "in_features: count, '3'",
            "out_features: count, 8.5",
            "out_features: count, 8.0",
            "out_features: count, None",
            "out_features: count, '3'",
            "out_features: count, nan",
            "nblocks: count, 2.5",
            "nblocks: count, 2.0",
            "nblocks: count, None",
            "nblocks: count, '3'",
            "rank: count, 2.5",
            "rank: count, 2.0",
            "rank: count, '3'",
        ],
    },
    "mmstar_matmul": {
        "AttributeError": [
            "factors: tree, None",
            "factors: tree, empty dict",
            "factors: tree, a string",
            "factors: tree, empty tuple",
            "factors: tree, list of leaves",
        ],
        "inconsistent sizes are accepted": [
            "factors: shape, extra axis in front",
            "factors: shape, extra axis behind",
        ],
    },
    "mmstar_to_dense": {
        "AttributeError": [
            "factors: tree, None",
            "factors: tree, empty dict",
            "factors: tree, a string",
            "factors: tree, empty tuple",
            "factors: tree, list of leaves",
        ],
        "inconsistent sizes are accepted": [
            "factors: shape, extra axis in front",
            "factors: shape, extra axis behind",
        ],
    },
    "monarch_chain_matmul": {
        "TypeError": [
            "factors: tree, None",
        ],
    },
    "monarch_chain_to_dense": {
        "TypeError": [
            "factors: tree, None",
        ],
    },
    "monarch_matmul_fused": {
        "TypeError": [
            "interpret: flag, Array(True, dtype=bool)",
        ],
    },
    "monarch_mup_multipliers": {
        "TypeError": [
            "in_features: count, None",
            "in_features: count, '3'",
            "out_features: count, None",
            "out_features: count, '3'",
            "nblocks: count, None",
            "nblocks: count, '3'",
            "rank: count, '3'",
        ],
    },
    "monarch_project": {
        "TypeError": [
            "nblocks_in: count, 2.0",
            "nblocks_in: count, None",
            "nblocks_in: count, '3'",
            "nblocks_out: count, 2.0",
            "nblocks_out: count, None",
            "nblocks_out: count, '3'",
            "rank: count, 1.5",
            "rank: count, 1.0",
            "rank: count, None",
            "rank: count, '3'",
        ],
    },
    "monarch_project_data": {
        "TypeError": [
            "nblocks_in: count, 2.0",
            "nblocks_in: count, None",
            "nblocks_in: count, '3'",
            "nblocks_out: count, 2.0",
            "nblocks_out: count, None",
            "nblocks_out: count, '3'",
            "rank: count, 1.5",
            "rank: count, 1.0",
            "rank: count, None",
            "rank: count, '3'",
            "num_iterations: count, None",
            "num_iterations: count, '3'",
            "ridge: scalar, None",
            "ridge: scalar, 'text'",
            "ridge: scalar, complex",
        ],
    },
    "monarch_project_error": {
        "TypeError": [
            "nblocks_in: count, 2.0",
            "nblocks_in: count, None",
            "nblocks_in: count, '3'",
            "nblocks_out: count, 2.0",
            "nblocks_out: count, None",
            "nblocks_out: count, '3'",
        ],
    },
    "row_shares": {
        "TypeError": [
            "rows: sequence, None",
            "rows: sequence, 3",
            "rows: sequence, array",
        ],
    },
    "Categorical[nll]": {
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
        ],
    },
    "Categorical[row_nll]": {
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
        ],
    },
    "Categorical[hessian_product]": {
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
            "v: leaf, a string",
            "v: leaf, None",
            "v: leaf, an object",
        ],
        "float64 NumPy warns": [
            "v: layout, float64",
        ],
        "integers are rounded to silently": [
            "v: dtype, int32",
            "v: dtype, bool",
            "v: dtype, uint8",
        ],
    },
    "Categorical[sample]": {
        "IndexError": [
            "outputs: shape, scalar",
        ],
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
        ],
    },
    "Bernoulli[nll]": {
        "float64 NumPy warns": [
            "outputs: layout, float64",
        ],
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
        ],
    },
    "Bernoulli[row_nll]": {
        "float64 NumPy warns": [
            "outputs: layout, float64",
        ],
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
        ],
    },
    "Bernoulli[hessian_product]": {
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
            "v: leaf, a string",
            "v: leaf, None",
            "v: leaf, an object",
        ],
        "float64 NumPy warns": [
            "v: layout, float64",
        ],
        "integers are rounded to silently": [
            "v: dtype, int32",
            "v: dtype, bool",
            "v: dtype, uint8",
        ],
    },
    "Bernoulli[sample]": {
        "float64 NumPy warns": [
            "outputs: layout, float64",
        ],
        "integers are rounded to silently": [
            "outputs: dtype, int32",
            "outputs: dtype, bool",
            "outputs: dtype, uint8",
        ],
        "TypeError": [
            "outputs: dtype, complex64",
        ],
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
        ],
    },
    "Gaussian[nll]": {
        "float64 NumPy warns": [
            "outputs: layout, float64",
        ],
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
        ],
    },
    "Gaussian[row_nll]": {
        "float64 NumPy warns": [
            "outputs: layout, float64",
        ],
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
        ],
    },
    "Gaussian[hessian_product]": {
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
            "v: leaf, a string",
            "v: leaf, None",
            "v: leaf, an object",
        ],
        "float64 NumPy warns": [
            "v: layout, float64",
        ],
        "integers are rounded to silently": [
            "v: dtype, int32",
            "v: dtype, bool",
            "v: dtype, uint8",
        ],
    },
    "Gaussian[sample]": {
        "float64 NumPy warns": [
            "outputs: layout, float64",
        ],
        "integers are rounded to silently": [
            "outputs: dtype, int32",
            "outputs: dtype, bool",
            "outputs: dtype, uint8",
        ],
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
        ],
    },
    "block_operator[block]": {
        "a result of another shape": [
            "vector: shape, extra axis behind",
            "vector: shape, first axis missing",
            "vector: shape, scalar",
            "vector: shape, axis 0 of 1",
        ],
        "TypeError": [
            "vector: shape, axis 0 of 0",
            "vector: shape, axis 0 of 2",
            "vector: shape, axis 0 of 4",
            "path: name, ['x']",
        ],
    },
    "bulk_edges": {
        "AttributeError": [
            "density: tree, None",
            "density: tree, empty dict",
            "density: tree, a string",
            "density: tree, empty tuple",
            "density: tree, list of leaves",
        ],
        "TypeError": [
            "density: shape, axis 0 of 0",
            "density: shape, axis 1 of 0",
            "density: leaf, a string",
            "density: leaf, None",
            "density: leaf, an object",
            "density: leaf, an object array",
        ],
        "a result of another shape": [
            "density: shape, extra axis in front",
            "density: shape, extra axis behind",
        ],
        "UFuncTypeError": [
            "density: leaf, a string array",
        ],
    },
    "damped_operator[damped]": {
        "a result of another shape": [
            "vector: shape, extra axis behind",
            "vector: shape, first axis missing",
            "vector: shape, scalar",
            "vector: shape, axis 0 of 1",
            "vector: shape, flat",
            "vector: shape, transposed",
            "vector: shape, axis 1 of 1",
        ],
        "TypeError": [
            "vector: shape, axis 0 of 0",
            "vector: shape, axis 0 of 2",
            "vector: shape, axis 0 of 4",
            "vector: shape, axis 1 of 0",
            "vector: shape, axis 1 of 3",
        ],
    },
    "density_from_eigenvalues": {
        "TypeError": [
            "sigma: scalar, None",
        ],
        "a result of another shape": [
            "sigma: scalar, array of two",
            "sigma: scalar, array of one",
        ],
    },
    "diagonal": {
        "TypeError": [
            "like: shape, axis 0 of 0",
            "like: shape, axis 0 of 2",
            "like: shape, axis 0 of 4",
            "like: shape, axis 1 of 0",
            "like: shape, axis 1 of 3",
        ],
    },
    "displacement_fraction": {
        "IndexError": [
            "vectors: tree, None",
            "vectors: tree, empty dict",
            "vectors: tree, empty tuple",
        ],
        "TypeError": [
            "ks: sequence, 3",
            "ks: sequence, (None,)",
        ],
    },
    "frobenius_norm": {
        "TypeError": [
            "like: shape, axis 0 of 0",
            "like: shape, axis 0 of 2",
            "like: shape, axis 0 of 4",
            "like: shape, axis 1 of 0",
            "like: shape, axis 1 of 3",
        ],
    },
    "full_matrix": {
        "TypeError": [
            "like: shape, axis 0 of 0",
            "like: shape, axis 0 of 2",
            "like: shape, axis 0 of 4",
            "like: shape, axis 1 of 0",
            "like: shape, axis 1 of 3",
        ],
    },
    "gram_fisher": {
        "TypeError": [
            "k: count, 2.5",
            "k: count, 2.0",
            "k: count, None",
            "k: count, '3'",
        ],
    },
    "hessian_operator[hessian]": {
        "TypeError": [
            "batch: tree, None",
        ],
    },
    "hessian_vector_product": {
        "TypeError": [
            "mode: name, ['x']",
        ],
    },
    "lanczos": {
        "TypeError": [
            "start: shape, axis 0 of 2",
            "start: shape, axis 0 of 4",
            "start: shape, axis 1 of 0",
            "start: shape, axis 1 of 3",
        ],
    },
    "logdet": {
        "TypeError": [
            "like: shape, axis 0 of 0",
            "like: shape, axis 0 of 2",
            "like: shape, axis 0 of 4",
            "like: shape, axis 1 of 0",
            "like: shape, axis 1 of 3",
            "damping: scalar, None",
            "damping: scalar, 'text'",
        ],
    },
    "plot_density[plot]": {
        "AttributeError": [
            "density: tree, None",
            "density: tree, empty dict",
            "density: tree, a string",
            "density: tree, empty tuple",
            "density: tree, list of leaves",
        ],
        "complex warns": [
            "density: dtype, complex64",
        ],
        "TypeError": [
            "density: leaf, an object array",
        ],
    },
    "ritz": {
        "AttributeError": [
            "result: tree, None",
            "result: tree, empty dict",
            "result: tree, a string",
            "result: tree, empty tuple",
            "result: tree, list of leaves",
            "result: leaf, a string",
            "result: leaf, None",
            "result: leaf, an object",
        ],
        "float64 NumPy warns": [
            "result: layout, float64",
        ],
        "inconsistent sizes are accepted": [
            "result: shape, extra axis in front",
            "result: shape, extra axis behind",
            "result: shape, first axis missing",
            "result: shape, scalar",
            "result: shape, axis 0 of 1",
            "result: shape, flat",
            "result: shape, transposed",
            "result: shape, axis 0 of 0",
            "result: shape, axis 0 of 2",
            "result: shape, axis 0 of 4",
        ],
    },
    "ritz_vectors": {
        "AttributeError": [
            "result: tree, None",
            "result: tree, empty dict",
            "result: tree, a string",
            "result: tree, empty tuple",
            "result: tree, list of leaves",
            "result: leaf, a string",
            "result: leaf, None",
            "result: leaf, an object",
        ],
        "inconsistent sizes are accepted": [
            "result: shape, extra axis in front",
            "result: shape, extra axis behind",
            "result: shape, first axis missing",
            "result: shape, scalar",
            "result: shape, axis 0 of 1",
        ],
        "IndexError": [
            "result: shape, flat",
            "result: leaf, an object array",
            "result: leaf, a string array",
        ],
        "TypeError": [
            "result: shape, axis 0 of 0",
            "result: shape, axis 0 of 2",
            "result: shape, axis 0 of 4",
            "indices: sequence, None",
            "indices: sequence, 3",
            "indices: sequence, 'text'",
            "indices: sequence, (None,)",
        ],
    },
    "sloppiness": {
        "TypeError": [
            "low: count, 0.0",
            "low: count, None",
            "low: count, '3'",
            "high: count, 3.5",
            "high: count, 3.0",
            "high: count, '3'",
        ],
    },
    "spectral_density": {
        "TypeError": [
            "like: shape, axis 0 of 0",
            "like: shape, axis 0 of 2",
            "like: shape, axis 0 of 4",
            "like: shape, axis 1 of 0",
            "like: shape, axis 1 of 3",
        ],
        "a result of another shape": [
            "sigma: scalar, array of two",
            "sigma: scalar, array of one",
        ],
        "complex warns": [
            "sigma: scalar, complex",
        ],
    },
    "spectral_sum": {
        "TypeError": [
            "like: shape, axis 0 of 0",
            "like: shape, axis 0 of 2",
            "like: shape, axis 0 of 4",
            "like: shape, axis 1 of 0",
            "like: shape, axis 1 of 3",
        ],
    },
    "spectrum_report": {
        "TypeError": [
            "damping: scalar, array of two",
            "damping: scalar, complex",
        ],
        "a result of another shape": [
            "damping: scalar, array of one",
        ],
    },
    "split_outliers": {
        "AttributeError": [
            "density: tree, None",
            "density: tree, empty dict",
            "density: tree, a string",
            "density: tree, empty tuple",
            "density: tree, list of leaves",
        ],
        "TypeError": [
            "density: shape, axis 0 of 0",
            "density: shape, axis 1 of 0",
            "density: leaf, a string",
            "density: leaf, None",
            "density: leaf, an object",
            "density: leaf, an object array",
            "factor: scalar, None",
            "factor: scalar, 'text'",
        ],
        "UFuncTypeError": [
            "density: leaf, a string array",
        ],
    },
    "subspace_overlap_curve": {
        "TypeError": [
            "ks: sequence, 3",
            "ks: sequence, (None,)",
        ],
    },
    "top_eigenpairs": {
        "TypeError": [
            "like: shape, axis 0 of 0",
            "like: shape, axis 0 of 2",
            "like: shape, axis 0 of 4",
            "like: shape, axis 1 of 0",
            "like: shape, axis 1 of 3",
            "tol: scalar, array of one",
            "tol: scalar, complex",
        ],
    },
    "trace": {
        "TypeError": [
            "like: shape, axis 0 of 0",
            "like: shape, axis 0 of 2",
            "like: shape, axis 0 of 4",
            "like: shape, axis 1 of 0",
            "like: shape, axis 1 of 3",
            "method: name, ['x']",
        ],
    },
    "gaussian_kl_low_rank": {
        "IndexError": [
            "vectors: tree, None",
            "vectors: tree, empty dict",
            "vectors: tree, empty tuple",
        ],
    },
    "gibbs_error": {
        "AttributeError": [
            "posterior: tree, None",
            "posterior: tree, empty dict",
            "posterior: tree, a string",
            "posterior: tree, empty tuple",
            "posterior: tree, list of leaves",
        ],
        "inconsistent sizes are accepted": [
            "posterior: shape, extra axis in front",
            "posterior: shape, extra axis behind",
            "posterior: shape, first axis missing",
            "posterior: shape, scalar",
            "posterior: shape, axis 0 of 0",
            "posterior: shape, axis 0 of 1",
            "posterior: shape, axis 0 of 3",
        ],
        "IndexError": [
            "vectors: tree, None",
            "vectors: tree, empty dict",
            "vectors: tree, empty tuple",
        ],
        "TypeError": [
            "num_samples: count, 3.5",
            "num_samples: count, None",
            "num_samples: count, '3'",
            "num_samples: count, array",
            "delta: scalar, None",
            "delta: scalar, 'text'",
            "delta: scalar, array of two",
            "delta: scalar, array of one",
            "delta: scalar, complex",
        ],
    },
    "pac_bayes_analytic": {
        "IndexError": [
            "vectors: tree, None",
            "vectors: tree, empty dict",
            "vectors: tree, empty tuple",
        ],
        "TypeError": [
            "num_examples: count, None",
            "num_examples: count, '3'",
            "prior_precision: scalar, complex",
            "delta: scalar, None",
            "delta: scalar, 'text'",
            "delta: scalar, array of two",
            "delta: scalar, array of one",
            "delta: scalar, complex",
        ],
    },
    "pac_bayes_grid": {
        "IndexError": [
            "vectors: tree, None",
            "vectors: tree, empty dict",
            "vectors: tree, empty tuple",
        ],
        "TypeError": [
            "num_examples: count, None",
            "num_examples: count, '3'",
            "num_priors: count, None",
            "num_priors: count, '3'",
            "spacing: scalar, None",
            "spacing: scalar, 'text'",
            "num_samples: count, 2.5",
            "num_samples: count, None",
            "num_samples: count, '3'",
            "num_samples: count, array",
            "num_final_samples: count, 2.5",
            "num_final_samples: count, None",
            "num_final_samples: count, '3'",
            "num_final_samples: count, array",
        ],
        "complex warns": [
            "spacing: scalar, complex",
        ],
    },
    "pac_bayes_optimize": {
        "IndexError": [
            "vectors: tree, None",
            "vectors: tree, empty dict",
            "vectors: tree, empty tuple",
        ],
        "TypeError": [
            "num_examples: count, None",
            "num_examples: count, '3'",
            "num_steps: count, 2.5",
            "num_steps: count, None",
            "delta: scalar, None",
            "delta: scalar, 'text'",
            "delta: scalar, array of two",
            "delta: scalar, array of one",
            "delta: scalar, complex",
        ],
        "ConcretizationTypeError": [
            "delta: scalar, same array",
        ],
    },
    "sample_gaussian_low_rank": {
        "IndexError": [
            "vectors: tree, None",
            "vectors: tree, empty dict",
            "vectors: tree, empty tuple",
        ],
    },
    "asam": {
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
        "integers are rounded to silently": [
            "updates: dtype, int32",
            "updates: dtype, bool",
            "updates: dtype, uint8",
        ],
        "TypeError": [
            "rho: scalar, None",
            "rho: scalar, 'text'",
        ],
        "complex warns": [
            "rho: scalar, complex",
        ],
    },
    "sam": {
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
        "integers are rounded to silently": [
            "updates: dtype, int32",
            "updates: dtype, bool",
            "updates: dtype, uint8",
        ],
        "TypeError": [
            "rho: scalar, None",
            "rho: scalar, 'text'",
        ],
        "complex warns": [
            "rho: scalar, complex",
            "eps: scalar, complex",
        ],
    },
    "gradient_norm_penalty": {
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
        "integers are rounded to silently": [
            "updates: dtype, int32",
            "updates: dtype, bool",
            "updates: dtype, uint8",
        ],
        "TypeError": [
            "alpha: scalar, complex",
            "radius: scalar, None",
            "radius: scalar, 'text'",
        ],
        "complex warns": [
            "radius: scalar, complex",
        ],
    },
    "look_sam": {
        "TypeError": [
            "params: dtype, float16",
            "params: dtype, bfloat16",
            "updates: dtype, int32",
            "updates: dtype, bool",
            "updates: dtype, float16",
            "updates: dtype, bfloat16",
            "updates: dtype, uint8",
            "rho: scalar, None",
            "rho: scalar, 'text'",
            "strength: scalar, None",
            "strength: scalar, 'text'",
        ],
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
        "complex warns": [
            "rho: scalar, complex",
        ],
    },
    "periodic": {
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
        "integers are rounded to silently": [
            "updates: dtype, int32",
            "updates: dtype, bool",
            "updates: dtype, uint8",
        ],
    },
    "hybrid": {
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
        "integers are rounded to silently": [
            "updates: dtype, int32",
            "updates: dtype, bool",
            "updates: dtype, uint8",
        ],
        "TypeError": [
            "probability: scalar, True",
            "probability: scalar, array of two",
            "probability: scalar, array of one",
            "probability: scalar, complex",
        ],
    },
    "esam_value_and_grad[esam]": {
        "TypeError": [
            "radius: scalar, None",
            "radius: scalar, 'text'",
            "weight_fraction: scalar, None",
            "weight_fraction: scalar, 'text'",
            "weight_fraction: scalar, True",
            "example_fraction: scalar, None",
            "example_fraction: scalar, complex",
        ],
        "complex warns": [
            "radius: scalar, complex",
            "weight_fraction: scalar, complex",
        ],
    },
    "full_batch_value_and_grad[full_batch]": {
        "float64 NumPy warns": [
            "params: layout, float64",
        ],
        "TypeError": [
            "alpha: scalar, complex",
            "radius: scalar, None",
            "radius: scalar, 'text'",
        ],
        "complex warns": [
            "radius: scalar, complex",
        ],
    },
    "micro_batch_value_and_grad[micro_batch]": {
        "float64 NumPy warns": [
            "params: layout, float64",
        ],
        "TypeError": [
            "alpha: scalar, complex",
            "radius: scalar, None",
            "radius: scalar, 'text'",
        ],
        "complex warns": [
            "radius: scalar, complex",
        ],
    },
    "m_sharpness_value_and_grad[m_sharpness]": {
        "float64 NumPy warns": [
            "params: layout, float64",
        ],
        "TypeError": [
            "alpha: scalar, complex",
            "radius: scalar, None",
            "radius: scalar, 'text'",
        ],
        "complex warns": [
            "radius: scalar, complex",
        ],
    },
    "gnp_value_and_grad[gnp]": {
        "TypeError": [
            "alpha: scalar, complex",
            "radius: scalar, None",
            "radius: scalar, 'text'",
        ],
        "complex warns": [
            "radius: scalar, complex",
        ],
    },
    "gnp_gradient": {
        "TypeError": [
            "alpha: scalar, complex",
            "radius: scalar, None",
            "radius: scalar, 'text'",
        ],
        "complex warns": [
            "radius: scalar, complex",
        ],
        "float64 NumPy warns": [
            "grads: layout, float64",
        ],
        "integers are rounded to silently": [
            "grads: dtype, int32",
            "grads: dtype, bool",
            "grads: dtype, uint8",
        ],
    },
    "gnp_gradient_exact": {
        "TypeError": [
            "penalty: scalar, None",
            "penalty: scalar, 'text'",
        ],
    },
    "head_line_search": {
        "TypeError": [
            "initial_step: scalar, None",
            "initial_step: scalar, 'text'",
            "initial_step: scalar, array of one",
            "initial_step: scalar, complex",
        ],
    },
    "in_window": {
        "a result of another shape": [
            "epoch: count, array",
            "start: count, array",
            "end: count, array",
        ],
        "TypeError": [
            "start: count, None",
            "start: count, '3'",
            "end: count, None",
            "end: count, '3'",
        ],
    },
    "lora_apply": {
        "AttributeError": [
            "pair: tree, None",
            "pair: tree, empty dict",
            "pair: tree, a string",
            "pair: tree, empty tuple",
            "pair: tree, list of leaves",
        ],
        "TypeError": [
            "scale: scalar, 'text'",
        ],
    },
    "lora_balance": {
        "integers are rounded to silently": [
            "adapters: dtype, int32",
            "adapters: dtype, bool",
            "adapters: dtype, uint8",
        ],
        "a result of another shape": [
            "adapters: shape, extra axis in front",
            "adapters: shape, extra axis behind",
        ],
    },
    "lora_merge": {
        "TypeError": [
            "scale: scalar, 'text'",
        ],
    },
    "mesa_loss": {
        "a result of another shape": [
            "weight: scalar, array of one",
            "temperature: scalar, array of one",
        ],
        "TypeError": [
            "weight: scalar, complex",
            "temperature: scalar, complex",
        ],
    },
    "saf_loss": {
        "a result of another shape": [
            "weight: scalar, array of one",
            "temperature: scalar, array of one",
        ],
        "TypeError": [
            "weight: scalar, complex",
            "temperature: scalar, complex",
        ],
        "complex warns": [
            "known: dtype, complex64",
        ],
    },
    "trajectory_loss": {
        "a result of another shape": [
            "temperature: scalar, array of one",
        ],
        "TypeError": [
            "temperature: scalar, complex",
        ],
    },
    "momentum_sam_value_and_grad[momentum]": {
        "TypeError": [
            "radius: scalar, None",
            "radius: scalar, 'text'",
            "decay: scalar, complex",
        ],
        "complex warns": [
            "radius: scalar, complex",
        ],
    },
    "perturb": {
        "TypeError": [
            "radius: scalar, None",
            "radius: scalar, 'text'",
        ],
        "complex warns": [
            "radius: scalar, complex",
        ],
    },
    "pof_perturb": {
        "a result of another shape": [
            "sampling_range: scalar, array of two",
            "sampling_range: scalar, array of one",
        ],
        "TypeError": [
            "sampling_range: scalar, complex",
        ],
    },
    "pof_value_and_grad[pof]": {
        "TypeError": [
            "sampling_range: scalar, complex",
        ],
    },
    "project_conflicting": {
        "integers are rounded to silently": [
            "grads: dtype, int32",
            "grads: dtype, bool",
            "grads: dtype, uint8",
        ],
    },
    "write_trajectory": {
        "AttributeError": [
            "buffer: tree, None",
            "buffer: tree, empty dict",
            "buffer: tree, a string",
            "buffer: tree, empty tuple",
            "buffer: tree, list of leaves",
            "buffer: layout, numpy",
            "buffer: layout, strided view",
            "buffer: layout, reversed view",
            "buffer: layout, fortran order",
            "buffer: layout, read only",
            "buffer: leaf, a string",
            "buffer: leaf, None",
            "buffer: leaf, an object",
            "buffer: leaf, an object array",
            "buffer: leaf, a string array",
        ],
        "float64 NumPy warns": [
            "buffer: layout, float64",
        ],
        "integers are rounded to silently": [
            "buffer: dtype, int32",
            "buffer: dtype, bool",
            "buffer: dtype, uint8",
        ],
        "inconsistent sizes are accepted": [
            "buffer: shape, axis 0 of 0",
            "buffer: shape, axis 0 of 1",
            "buffer: shape, axis 0 of 5",
            "buffer: shape, axis 0 of 7",
            "buffer: shape, axis 1 of 0",
            "buffer: shape, axis 1 of 1",
            "buffer: shape, axis 1 of 3",
            "buffer: shape, extra axis in front",
            "buffer: shape, extra axis behind",
            "buffer: shape, transposed",
        ],
        "IndexError": [
            "buffer: shape, first axis missing",
            "buffer: shape, flat",
            "buffer: shape, scalar",
        ],
    },
    "read_trajectory": {
        "AttributeError": [
            "buffer: tree, None",
            "buffer: tree, empty dict",
            "buffer: tree, a string",
            "buffer: tree, empty tuple",
            "buffer: tree, list of leaves",
            "buffer: layout, numpy",
            "buffer: layout, strided view",
            "buffer: layout, reversed view",
            "buffer: layout, fortran order",
            "buffer: layout, float64",
            "buffer: layout, read only",
            "buffer: leaf, a string",
            "buffer: leaf, None",
            "buffer: leaf, an object",
            "buffer: leaf, an object array",
            "buffer: leaf, a string array",
        ],
        "integers are rounded to silently": [
            "buffer: dtype, int32",
            "buffer: dtype, bool",
            "buffer: dtype, uint8",
        ],
        "inconsistent sizes are accepted": [
            "buffer: shape, transposed",
            "buffer: shape, axis 0 of 1",
            "buffer: shape, axis 0 of 5",
            "buffer: shape, axis 0 of 7",
            "buffer: shape, axis 1 of 1",
            "buffer: shape, axis 1 of 3",
            "buffer: shape, extra axis behind",
        ],
        "TypeError": [
            "buffer: shape, axis 0 of 0",
            "buffer: shape, axis 1 of 0",
        ],
        "IndexError": [
            "buffer: shape, first axis missing",
            "buffer: shape, flat",
            "buffer: shape, scalar",
        ],
    },
    "recompute_batch_stats": {
        "TypeError": [
            "batches: tree, None",
            "momentum: scalar, None",
            "momentum: scalar, 'text'",
            "momentum: scalar, array of two",
        ],
        "integers are rounded to silently": [
            "state: dtype, int32",
            "state: dtype, bool",
            "state: dtype, uint8",
        ],
    },
    "regularised_lora_value_and_grad[lora_grad]": {
        "a result of another shape": [
            "alpha: scalar, array of two",
        ],
        "TypeError": [
            "alpha: scalar, complex",
            "radius: scalar, None",
            "radius: scalar, 'text'",
        ],
        "complex warns": [
            "radius: scalar, complex",
        ],
    },
    "subspace_loss": {
        "TypeError": [
            "beta: scalar, None",
            "beta: scalar, 'text'",
        ],
        "a result of another shape": [
            "beta: scalar, array of two",
            "beta: scalar, array of one",
        ],
    },
    "update_teacher": {
        "float64 NumPy warns": [
            "teacher: layout, float64",
        ],
        "TypeError": [
            "decay: scalar, None",
            "decay: scalar, 'text'",
        ],
    },
    "annealed_gradient_noise": {
        "another dtype": [
            "params: dtype, float16",
            "params: dtype, bfloat16",
            "updates: dtype, float16",
            "updates: dtype, bfloat16",
        ],
    },
    "gradient_noise_schedule[noise_at]": {
        "a result of another shape": [
            "eta: scalar, array of two",
            "eta: scalar, array of one",
            "gamma: scalar, array of two",
            "gamma: scalar, array of one",
        ],
    },
    "Hyperparameter[hyperparameter]": {
        "TypeError": [
            "init: scalar, None",
            "init: scalar, 'text'",
            "init: scalar, complex",
            "lo: scalar, None",
            "lo: scalar, 'text'",
            "lo: scalar, array of one",
            "lo: scalar, complex",
            "hi: scalar, None",
            "hi: scalar, 'text'",
            "hi: scalar, array of one",
            "hi: scalar, complex",
        ],
        "a result of another shape": [
            "init: scalar, array of one",
        ],
    },
    "unconstrain[unconstrain]": {
        "TypeError": [
            "values: tree, None",
            "values: tree, list of leaves",
        ],
        "AttributeError": [
            "values: tree, empty tuple",
        ],
    },
    "gated_conv": {
        "AttributeError": [
            "params: tree, None",
            "params: tree, empty dict",
            "params: tree, a string",
            "params: tree, empty tuple",
            "params: tree, list of leaves",
            "params: leaf, a string",
            "params: leaf, None",
            "params: leaf, an object",
        ],
        "float64 NumPy warns": [
            "params: layout, float64",
        ],
        "IndexError": [
            "params: shape, flat",
            "params: shape, scalar",
            "params: leaf, an object array",
            "params: leaf, a string array",
            "params: shape, first axis missing",
        ],
        "TypeError": [
            "params: shape, axis 0 of 0",
            "params: shape, axis 1 of 0",
            "params: shape, axis 3 of 0",
            "params: shape, axis 3 of 3",
            "params: shape, extra axis behind",
            "params: shape, axis 1 of 3",
            "params: shape, axis 0 of 3",
            "strides: count, 2.5",
            "strides: count, 2.0",
            "strides: count, None",
            "strides: count, '3'",
            "strides: count, nan",
            "strides: count, numpy integer",
            "strides: count, array",
            "groups: count, None",
        ],
        "inconsistent sizes are accepted": [
            "params: shape, axis 0 of 1",
            "params: shape, axis 0 of 2",
            "params: shape, axis 0 of 4",
            "params: shape, axis 1 of 1",
            "params: shape, axis 1 of 2",
            "params: shape, axis 1 of 4",
            "params: shape, axis 3 of 1",
            "params: shape, extra axis in front",
        ],
        "ZeroDivisionError": [
            "x: shape, axis 1 of 0",
            "x: shape, axis 2 of 0",
        ],
        "RuntimeWarning": [
            "strides: count, 0",
        ],
    },
    "gated_linear": {
        "AttributeError": [
            "params: tree, None",
            "params: tree, empty dict",
            "params: tree, a string",
            "params: tree, empty tuple",
            "params: tree, list of leaves",
            "params: leaf, a string",
            "params: leaf, None",
            "params: leaf, an object",
        ],
        "float64 NumPy warns": [
            "params: layout, float64",
        ],
        "TypeError": [
            "params: shape, axis 1 of 0",
            "params: shape, axis 1 of 3",
            "params: shape, extra axis behind",
            "params: shape, first axis missing",
            "params: shape, flat",
            "params: shape, transposed",
            "params: shape, axis 0 of 0",
            "params: shape, axis 0 of 1",
            "params: shape, axis 0 of 2",
            "params: shape, axis 0 of 4",
            "params: shape, axis 0 of 3",
        ],
        "inconsistent sizes are accepted": [
            "params: shape, axis 1 of 1",
            "params: shape, extra axis in front",
        ],
        "IndexError": [
            "params: shape, scalar",
        ],
    },
    "gated_weights": {
        "AttributeError": [
            "params: tree, None",
            "params: tree, empty dict",
            "params: tree, a string",
            "params: tree, empty tuple",
            "params: tree, list of leaves",
        ],
        "inconsistent sizes are accepted": [
            "params: shape, extra axis in front",
            "params: shape, first axis missing",
            "params: shape, scalar",
            "params: shape, axis 0 of 1",
            "params: shape, axis 1 of 1",
        ],
        "TypeError": [
            "params: shape, extra axis behind",
            "params: shape, transposed",
            "params: shape, axis 0 of 0",
            "params: shape, axis 0 of 2",
            "params: shape, axis 0 of 4",
            "params: shape, axis 1 of 0",
            "params: shape, axis 1 of 3",
            "params: leaf, a string",
            "params: leaf, None",
            "params: leaf, an object",
            "params: shape, axis 0 of 3",
            "params: shape, flat",
        ],
    },
    "hyperparameter_gradient": {
        "TypeError": [
            "entropy_weight: scalar, array of two",
            "entropy_weight: scalar, array of one",
            "entropy_weight: scalar, complex",
        ],
    },
    "init_gated": {
        "TypeError": [
            "shape: sequence, None",
            "shape: sequence, 3",
            "gate_scale: scalar, None",
            "gate_scale: scalar, 'text'",
            "gate_scale: scalar, complex",
        ],
        "a result of another shape": [
            "use_bias: flag, None",
        ],
    },
    "coherence_from_moments": {
        "AttributeError": [
            "moments: tree, None",
            "moments: tree, empty dict",
            "moments: tree, a string",
            "moments: tree, empty tuple",
            "moments: tree, list of leaves",
        ],
        "TypeError": [
            "moments: leaf, a string",
            "moments: leaf, an object",
            "moments: leaf, None",
            "moments: leaf, an object array",
            "moments: leaf, a string array",
        ],
        "inconsistent sizes are accepted": [
            "moments: shape, extra axis in front",
            "moments: shape, extra axis behind",
        ],
    },
    "median_of_means": {
        "ZeroDivisionError": [
            "x: shape, axis 1 of 0",
        ],
        "TypeError": [
            "axis: count, 0.5",
            "axis: count, 0.0",
            "axis: count, None",
            "axis: count, '3'",
        ],
    },
    "running_median": {
        "AttributeError": [
            "params: tree, leaf None",
            "params: leaf, None",
        ],
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
        "integers are rounded to silently": [
            "updates: dtype, int32",
            "updates: dtype, bool",
            "updates: dtype, uint8",
        ],
    },
    "winsorized_mean": {
        "TypeError": [
            "axis: count, 0.5",
            "axis: count, 0.0",
            "axis: count, None",
            "axis: count, '3'",
        ],
    },
    "describe_blocks": {
        "AttributeError": [
            "params: tree, a string",
            "params: tree, leaf a string",
            "params: leaf, a string",
            "params: leaf, an object",
        ],
        "ZeroDivisionError": [
            "params: shape, axis 1 of 0",
            "max_size: count, 0",
        ],
        "TypeError": [
            "max_size: count, None",
            "max_size: count, '3'",
            "max_size: count, array",
        ],
    },
    "fishleg": {
        "AttributeError": [
            "params: tree, a string",
            "params: tree, leaf a string",
            "params: leaf, a string",
            "params: leaf, an object",
        ],
        "trees that differ are accepted": [
            "params: shape, extra axis in front",
            "params: shape, extra axis behind",
        ],
        "ZeroDivisionError": [
            "params: shape, axis 1 of 0",
        ],
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
        "TypeError": [
            "updates: shape, extra axis in front",
            "updates: shape, extra axis behind",
            "damping: scalar, None",
            "damping: scalar, 'text'",
        ],
    },
    "scale_by_fishleg": {
        "AttributeError": [
            "params: tree, a string",
            "params: tree, leaf a string",
            "params: leaf, a string",
            "params: leaf, an object",
        ],
        "trees that differ are accepted": [
            "params: shape, extra axis in front",
            "params: shape, extra axis behind",
            "params: shape, flat",
            "params: shape, transposed",
            "updates: shape, flat",
            "updates: shape, transposed",
        ],
        "ZeroDivisionError": [
            "params: shape, axis 1 of 0",
        ],
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
        "integers are rounded to silently": [
            "updates: dtype, int32",
            "updates: dtype, bool",
            "updates: dtype, uint8",
        ],
        "TypeError": [
            "updates: shape, extra axis in front",
            "updates: shape, extra axis behind",
            "damping: scalar, None",
            "damping: scalar, 'text'",
            "pre_aux_steps: count, array",
        ],
    },
    "fishleg_auxiliary_gradient[auxiliary_gradient]": {
        "AttributeError": [
            "q: tree, None",
            "q: tree, empty dict",
            "q: tree, a string",
            "q: tree, empty tuple",
            "q: tree, list of leaves",
        ],
        "float32 became [('float0', 'V')]": [
            "q: dtype, int32",
            "q: dtype, bool",
            "q: dtype, uint8",
        ],
        "TypeError": [
            "q: shape, extra axis behind",
            "q: shape, flat",
            "q: shape, transposed",
            "q: shape, axis 0 of 0",
            "q: shape, axis 0 of 2",
            "q: shape, axis 1 of 0",
            "q: shape, axis 1 of 1",
            "q: shape, axis 1 of 3",
            "q: shape, axis 1 of 5",
            "q: shape, axis 2 of 0",
            "q: shape, axis 2 of 1",
            "q: shape, axis 2 of 3",
            "q: shape, axis 2 of 5",
            "u: shape, extra axis in front",
            "u: shape, extra axis behind",
            "damping: scalar, None",
            "damping: scalar, 'text'",
        ],
        "IndexError": [
            "q: shape, first axis missing",
            "q: shape, scalar",
        ],
    },
    "fishleg_auxiliary_loss": {
        "AttributeError": [
            "q: tree, None",
            "q: tree, empty dict",
            "q: tree, a string",
            "q: tree, empty tuple",
            "q: tree, list of leaves",
        ],
        "TypeError": [
            "q: shape, extra axis behind",
            "q: shape, flat",
            "q: shape, transposed",
            "q: shape, axis 0 of 0",
            "q: shape, axis 0 of 2",
            "q: shape, axis 1 of 0",
            "q: shape, axis 1 of 1",
            "q: shape, axis 1 of 3",
            "q: shape, axis 1 of 5",
            "q: shape, axis 2 of 0",
            "q: shape, axis 2 of 1",
            "q: shape, axis 2 of 3",
            "q: shape, axis 2 of 5",
            "q: leaf, a string",
            "q: leaf, an object",
            "u: shape, extra axis in front",
            "u: shape, extra axis behind",
            "damping: scalar, None",
            "damping: scalar, 'text'",
        ],
        "IndexError": [
            "q: shape, first axis missing",
            "q: shape, scalar",
            "q: leaf, an object array",
            "q: leaf, a string array",
        ],
    },
    "fishleg_group_step": {
        "AttributeError": [
            "q: tree, None",
            "q: tree, empty dict",
            "q: tree, a string",
            "q: tree, empty tuple",
            "q: tree, list of leaves",
        ],
        "TypeError": [
            "q: shape, extra axis behind",
            "q: shape, flat",
            "q: shape, transposed",
            "q: shape, axis 0 of 0",
            "q: shape, axis 0 of 2",
            "q: shape, axis 1 of 0",
            "q: shape, axis 1 of 1",
            "q: shape, axis 1 of 3",
            "q: shape, axis 1 of 5",
            "q: shape, axis 2 of 0",
            "q: shape, axis 2 of 1",
            "q: shape, axis 2 of 3",
            "q: shape, axis 2 of 5",
            "q: leaf, a string",
            "q: leaf, an object",
            "gradients: shape, extra axis in front",
            "gradients: shape, extra axis behind",
            "damping: scalar, None",
            "damping: scalar, 'text'",
            "step: scalar, None",
            "step: scalar, 'text'",
            "white_directions: count, 1.5",
            "white_directions: count, '3'",
            "white_directions: count, nan",
        ],
        "IndexError": [
            "q: shape, first axis missing",
            "q: shape, scalar",
            "q: leaf, an object array",
            "q: leaf, a string array",
        ],
    },
    "fishleg_warm_start[warm_start]": {
        "AttributeError": [
            "params: tree, a string",
            "params: tree, leaf a string",
            "params: leaf, a string",
            "params: leaf, an object",
        ],
        "ZeroDivisionError": [
            "params: shape, axis 1 of 0",
        ],
        "TypeError": [
            "batches: tree, None",
            "damping: scalar, None",
            "damping: scalar, 'text'",
        ],
    },
    "inverse_fisher": {
        "AttributeError": [
            "like: tree, a string",
            "like: tree, leaf a string",
            "like: leaf, a string",
            "like: leaf, an object",
        ],
        "TypeError": [
            "like: dtype, float16",
            "like: dtype, bfloat16",
            "damping: scalar, None",
            "damping: scalar, 'text'",
            "damping: scalar, complex",
            "tol: scalar, None",
            "tol: scalar, array of two",
            "tol: scalar, array of one",
            "max_steps: count, None",
            "max_steps: count, array",
        ],
        "ZeroDivisionError": [
            "like: shape, axis 1 of 0",
        ],
    },
    "q_apply": {
        "AttributeError": [
            "q: tree, None",
            "q: tree, empty dict",
            "q: tree, a string",
            "q: tree, empty tuple",
            "q: tree, list of leaves",
        ],
        "TypeError": [
            "q: shape, extra axis behind",
            "q: shape, flat",
            "q: shape, transposed",
            "q: shape, axis 0 of 0",
            "q: shape, axis 0 of 2",
            "q: shape, axis 1 of 0",
            "q: shape, axis 1 of 1",
            "q: shape, axis 1 of 3",
            "q: shape, axis 1 of 5",
            "q: shape, axis 2 of 0",
            "q: shape, axis 2 of 1",
            "q: shape, axis 2 of 3",
            "q: shape, axis 2 of 5",
            "q: leaf, a string",
            "q: leaf, an object",
            "u: shape, extra axis in front",
            "u: shape, extra axis behind",
        ],
        "IndexError": [
            "q: shape, first axis missing",
            "q: shape, scalar",
            "q: leaf, an object array",
            "q: leaf, a string array",
        ],
        "float64 NumPy warns": [
            "u: layout, float64",
        ],
        "integers are rounded to silently": [
            "u: dtype, int32",
            "u: dtype, bool",
            "u: dtype, uint8",
        ],
    },
    "q_dense": {
        "AttributeError": [
            "q: tree, None",
            "q: tree, empty dict",
            "q: tree, empty tuple",
            "q: tree, list of leaves",
        ],
        "TypeError": [
            "q: shape, extra axis behind",
            "q: shape, flat",
            "q: shape, transposed",
            "q: shape, axis 0 of 0",
            "q: shape, axis 0 of 2",
            "q: shape, axis 1 of 0",
            "q: shape, axis 1 of 1",
            "q: shape, axis 1 of 3",
            "q: shape, axis 1 of 5",
            "q: shape, axis 2 of 0",
            "q: shape, axis 2 of 1",
            "q: shape, axis 2 of 3",
            "q: shape, axis 2 of 5",
            "like: shape, extra axis in front",
            "like: shape, extra axis behind",
        ],
        "IndexError": [
            "q: shape, first axis missing",
            "q: shape, scalar",
        ],
    },
    "q_diag": {
        "AttributeError": [
            "q: tree, None",
            "q: tree, empty dict",
            "q: tree, a string",
            "q: tree, empty tuple",
            "q: tree, list of leaves",
            "q: leaf, a string",
            "q: leaf, an object",
        ],
        "TypeError": [
            "q: shape, axis 0 of 0",
            "q: shape, axis 2 of 0",
            "q: shape, axis 2 of 3",
            "like: leaf, an object array",
            "like: leaf, a string array",
        ],
        "float64 NumPy warns": [
            "like: layout, float64",
        ],
        "integers are rounded to silently": [
            "like: dtype, int32",
            "like: dtype, bool",
            "like: dtype, uint8",
        ],
    },
    "q_init": {
        "AttributeError": [
            "params: tree, a string",
            "params: tree, leaf a string",
            "params: leaf, a string",
            "params: leaf, an object",
        ],
        "ZeroDivisionError": [
            "params: shape, axis 1 of 0",
        ],
        "TypeError": [
            "scale: scalar, complex",
        ],
    },
    "log_hypothesis_weight": {
        "TypeError": [
            "eps: scalar, array of two",
        ],
    },
    "psgld": {
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
    },
    "sgld": {
        "float64 NumPy warns": [
            "updates: layout, float64",
        ],
    },
    "sgld_step_size[step_size_at]": {
        "a result of another shape": [
            "scale: scalar, array of two",
            "scale: scalar, array of one",
            "power: scalar, array of two",
            "power: scalar, array of one",
        ],
    },
    "continual_run": {
        "TypeError": [
            "state: dtype, int32",
            "state: dtype, bool",
            "state: dtype, float16",
            "state: dtype, bfloat16",
            "state: dtype, uint8",
            "tasks: dtype, complex64",
        ],
        "a result of another shape": [
            "state: shape, extra axis in front",
            "state: shape, extra axis behind",
        ],
    },
    "near_zero_fraction": {
        "TypeError": [
            "tolerance: scalar, array of two",
        ],
    },
    "scale_by_power": {
        "integers are rounded to silently": [
            "updates: dtype, int32",
            "updates: dtype, bool",
            "updates: dtype, uint8",
        ],
    },
    "train_to_loss": {
        "TypeError": [
            "state: dtype, int32",
            "state: dtype, bool",
            "state: dtype, float16",
            "state: dtype, bfloat16",
            "state: dtype, uint8",
            "data: dtype, complex64",
            "target: scalar, array of two",
            "target: scalar, array of one",
        ],
    },
    "MonarchLinear[monarch_linear]": {
        "AttributeError": [
            "x: leaf, None",
        ],
        "TypeError": [
            "in_features: count, 8.5",
            "in_features: count, 8.0",
            "in_features: count, None",
            "in_features: count, '3'",
            "in_features: count, nan",
            "out_features: count, 6.5",
            "out_features: count, 6.0",
            "out_features: count, None",
            "out_features: count, '3'",
            "out_features: count, nan",
            "nblocks: count, 2.5",
            "nblocks: count, 2.0",
            "nblocks: count, None",
            "nblocks: count, '3'",
            "nblocks: count, nan",
        ],
    },
    "MonarchStack[monarch_stack]": {
        "AttributeError": [
            "x: leaf, None",
        ],
        "TypeError": [
            "sizes: sequence, None",
            "sizes: sequence, 3",
            "sizes: sequence, 'text'",
            "nblocks: count, 2.0",
            "nblocks: count, None",
            "nblocks: count, '3'",
        ],
    },
    "SelfTuningConv[tuning_conv]": {
        "ZeroDivisionError": [
            "x: shape, axis 1 of 0",
            "x: shape, axis 2 of 0",
        ],
        "TypeError": [
            "window: sequence, None",
            "window: sequence, 3",
        ],
    },
    "monarchize[monarchize]": {
        "AttributeError": [
            "x: leaf, None",
        ],
        "TypeError": [
            "nblocks: count, 2.5",
            "nblocks: count, 2.0",
            "nblocks: count, None",
            "nblocks: count, '3'",
            "nblocks: count, nan",
            "rank: count, 2.5",
            "rank: count, 2.0",
            "rank: count, '3'",
        ],
    },
    "monarchize_params[monarchize_params]": {
        "integers are rounded to silently": [
            "params: dtype, int32",
            "params: dtype, bool",
            "params: dtype, uint8",
        ],
        "TypeError": [
            "nblocks: count, 2.5",
            "nblocks: count, 2.0",
            "nblocks: count, None",
            "nblocks: count, '3'",
            "nblocks: count, nan",
        ],
    },
    "Autoencoder[autoencoder]": {
        "TypeError": [
            "sizes: sequence, None",
            "sizes: sequence, 3",
            "sizes: sequence, 'text'",
        ],
    },
    "MLP[mlp]": {
        "TypeError": [
            "sizes: sequence, None",
            "sizes: sequence, 3",
            "sizes: sequence, 'text'",
        ],
    },
    "CNN[cnn]": {
        "TypeError": [
            "side: count, None",
            "side: count, '3'",
            "features: sequence, (2.5,)",
            "features: sequence, None",
            "features: sequence, 3",
            "features: sequence, (None,)",
            "strides: sequence, (2.5,)",
            "strides: sequence, None",
            "strides: sequence, 3",
            "strides: sequence, (None,)",
            "strides: sequence, array",
            "outputs: count, 3.5",
            "outputs: count, 3.0",
            "outputs: count, None",
            "outputs: count, '3'",
            "outputs: count, nan",
        ],
    },
    "GPT[gpt]": {
        "TypeError": [
            "vocabulary: count, 7.5",
            "vocabulary: count, 7.0",
            "vocabulary: count, None",
            "vocabulary: count, '3'",
            "vocabulary: count, nan",
            "context: count, 5.5",
            "context: count, 5.0",
            "context: count, None",
            "context: count, '3'",
            "context: count, nan",
            "width: count, 4.5",
            "width: count, 4.0",
            "width: count, None",
            "width: count, '3'",
            "width: count, nan",
            "layers: count, 1.5",
            "layers: count, 1.0",
            "layers: count, None",
            "layers: count, '3'",
            "layers: count, nan",
            "heads: count, 2.0",
            "heads: count, None",
            "heads: count, '3'",
        ],
    },
    "Mixer[mixer]": {
        "TypeError": [
            "token_hidden: count, 2.5",
            "token_hidden: count, 2.0",
            "token_hidden: count, None",
            "token_hidden: count, '3'",
            "token_hidden: count, nan",
            "channel_hidden: count, 4.5",
            "channel_hidden: count, 4.0",
            "channel_hidden: count, None",
            "channel_hidden: count, '3'",
            "channel_hidden: count, nan",
            "side: count, 4.5",
            "side: count, 4.0",
            "side: count, None",
            "side: count, '3'",
            "side: count, nan",
            "patch: count, 2.0",
            "patch: count, None",
            "patch: count, '3'",
            "width: count, 4.5",
            "width: count, 4.0",
            "width: count, None",
            "width: count, '3'",
            "width: count, nan",
            "blocks: count, 1.5",
            "blocks: count, 1.0",
            "blocks: count, None",
            "blocks: count, '3'",
            "blocks: count, nan",
            "outputs: count, 3.5",
            "outputs: count, 3.0",
            "outputs: count, None",
            "outputs: count, '3'",
            "outputs: count, nan",
        ],
    },
    "ViT[vit]": {
        "TypeError": [
            "heads: count, 2.0",
            "heads: count, None",
            "heads: count, '3'",
            "side: count, 4.5",
            "side: count, 4.0",
            "side: count, None",
            "side: count, '3'",
            "side: count, nan",
            "patch: count, 2.0",
            "patch: count, None",
            "patch: count, '3'",
            "width: count, 4.5",
            "width: count, 4.0",
            "width: count, None",
            "width: count, '3'",
            "width: count, nan",
            "blocks: count, 1.5",
            "blocks: count, 1.0",
            "blocks: count, None",
            "blocks: count, '3'",
            "blocks: count, nan",
            "outputs: count, 3.5",
            "outputs: count, 3.0",
            "outputs: count, None",
            "outputs: count, '3'",
            "outputs: count, nan",
        ],
    },
    "create_state[create_state]": {
        "a result of another shape": [
            "key: key, two keys",
            "loss_scale: scalar, array of two",
            "loss_scale: scalar, array of one",
        ],
        "integers are rounded to silently": [
            "params: dtype, int32",
            "params: dtype, bool",
            "params: dtype, uint8",
        ],
        "TypeError": [
            "loss_scale: scalar, complex",
        ],
    },
    "fit[fit]": {
        "TypeError": [
            "evaluate_every: count, None",
            "evaluate_every: count, '3'",
            "steps_per_call: count, 2.0",
            "steps_per_call: count, '3'",
        ],
    },
    "fit[fit_streamed]": {
        "TypeError": [
            "steps_per_epoch: count, 1.5",
            "steps_per_epoch: count, 1.0",
            "steps_per_epoch: count, '3'",
        ],
    },
    "reverse_sparsification[reverse]": {
        "AttributeError": [
            "inputs: leaf, None",
        ],
        "TypeError": [
            "epochs: count, None",
            "epochs: count, '3'",
            "dense_fraction: scalar, None",
            "dense_fraction: scalar, 'text'",
            "dense_fraction: scalar, complex",
        ],
    },
    "evaluate[evaluate]": {
        "RuntimeWarning": [
            "batch: value, inf",
            "batch: value, -inf",
        ],
    },
    "Checkpoints[checkpoints]": {
        "integers are rounded to silently": [
            "state: dtype, int32",
            "state: dtype, bool",
            "state: dtype, uint8",
        ],
        "RuntimeError": [
            "state: leaf, an object array",
            "state: leaf, a string array",
            "step: count, numpy integer",
            "keep: count, 2.5",
            "keep: count, 2.0",
            "keep: count, nan",
        ],
        "TypeError": [
            "step: count, array",
            "keep: count, None",
            "keep: count, '3'",
        ],
    },
    "accuracy": {
        "AttributeError": [
            "outputs: leaf, a string",
            "outputs: leaf, None",
            "outputs: leaf, an object",
            "targets: leaf, a string",
            "targets: leaf, None",
            "targets: leaf, an object",
        ],
    },
    "epoch_order": {
        "OverflowError": [
            "epoch: count, -1",
        ],
        "TypeError": [
            "epoch: count, array",
            "size: count, 4.5",
            "size: count, 4.0",
            "size: count, None",
            "size: count, '3'",
            "size: count, nan",
        ],
    },
    "from_nnx[from_nnx]": {
        "TypeError": [
            "x: shape, extra axis behind",
            "x: shape, flat",
            "x: shape, scalar",
            "x: shape, transposed",
            "x: shape, axis 1 of 0",
            "x: shape, axis 1 of 1",
            "x: shape, axis 1 of 2",
            "x: shape, axis 1 of 4",
        ],
        "AttributeError": [
            "x: leaf, None",
        ],
    },
    "curves[curves]": {
        "TypeError": [
            "train: count, 2.5",
            "train: count, 2.0",
            "train: count, None",
            "train: count, '3'",
            "train: count, nan",
            "train: count, array",
            "test: count, 1.5",
            "test: count, 1.0",
            "test: count, None",
            "test: count, '3'",
            "test: count, nan",
            "test: count, array",
            "seed: count, 0.5",
            "seed: count, 0.0",
            "seed: count, '3'",
            "seed: count, nan",
            "seed: count, array",
        ],
    },
    "gaussian_clusters[clusters]": {
        "TypeError": [
            "classes: count, 3.5",
            "classes: count, 3.0",
            "classes: count, True",
            "classes: count, None",
            "classes: count, '3'",
            "classes: count, nan",
            "dim: count, 2.5",
            "dim: count, 2.0",
            "dim: count, True",
            "dim: count, None",
            "dim: count, '3'",
            "dim: count, nan",
            "separation: scalar, None",
            "separation: scalar, 'text'",
            "separation: scalar, array of two",
            "separation: scalar, array of one",
            "separation: scalar, same array",
            "train: count, 6.5",
            "train: count, 6.0",
            "train: count, True",
            "train: count, None",
            "train: count, nan",
            "train: count, array",
            "validation: count, 2.5",
            "validation: count, 2.0",
            "validation: count, True",
            "validation: count, None",
            "validation: count, nan",
            "validation: count, array",
            "test: count, 2.5",
            "test: count, 2.0",
            "test: count, True",
            "test: count, None",
            "test: count, nan",
            "test: count, array",
            "seed: count, 0.5",
            "seed: count, 0.0",
            "seed: count, '3'",
            "seed: count, nan",
            "seed: count, array",
        ],
        "complex warns": [
            "separation: scalar, complex",
        ],
        "UFuncTypeError": [
            "train: count, '3'",
            "validation: count, '3'",
            "test: count, '3'",
        ],
    },
    "planted_structure[planted]": {
        "TypeError": [
            "structure: name, ['x']",
            "train: count, 4.5",
            "train: count, 4.0",
            "train: count, True",
            "train: count, None",
            "train: count, '3'",
            "train: count, nan",
            "train: count, array",
            "validation: count, 2.5",
            "validation: count, 2.0",
            "validation: count, True",
            "validation: count, None",
            "validation: count, '3'",
            "validation: count, nan",
            "validation: count, array",
            "test: count, 2.5",
            "test: count, 2.0",
            "test: count, True",
            "test: count, None",
            "test: count, '3'",
            "test: count, nan",
            "test: count, array",
            "noise_scale: scalar, None",
            "noise_scale: scalar, array of one",
            "noise_scale: scalar, same array",
            "seed: count, 0.5",
            "seed: count, 0.0",
            "seed: count, '3'",
            "seed: count, nan",
            "seed: count, array",
        ],
        "UFuncTypeError": [
            "noise_scale: scalar, 'text'",
        ],
        "complex warns": [
            "noise_scale: scalar, complex",
        ],
    },
    "make_dataset[make_dataset]": {
        "AttributeError": [
            "inputs: leaf, a string",
            "inputs: leaf, None",
            "inputs: leaf, an object",
            "targets: leaf, a string",
            "targets: leaf, None",
            "targets: leaf, an object",
        ],
    },
    "content_digest[content_digest]": {
        "TypeError": [
            "inputs: leaf, None",
            "inputs: leaf, an object",
            "inputs: leaf, an object array",
            "targets: leaf, None",
            "targets: leaf, an object",
            "targets: leaf, an object array",
        ],
    },
    "round_for_digest": {
        "RuntimeWarning": [
            "array: dtype, float16",
        ],
        "TypeError": [
            "array: leaf, a string",
            "array: leaf, None",
            "array: leaf, an object",
            "array: leaf, an object array",
        ],
        "UFuncTypeError": [
            "array: leaf, a string array",
        ],
    },
    "load_or_prepare[stored]": {
        "RuntimeError": [
            "inputs: shape, axis 1 of 0",
        ],
        "AttributeError": [
            "inputs: leaf, a string",
            "inputs: leaf, None",
            "inputs: leaf, an object",
            "targets: leaf, a string",
            "targets: leaf, None",
            "targets: leaf, an object",
        ],
    },
    "encode_text": {
        "AttributeError": [
            "text: name, None",
            "text: name, 3",
            "text: name, ['x']",
        ],
    },
    "decode_text": {
        "IndexError": [
            "tokens: dtype, bool",
            "tokens: dtype, float16",
            "tokens: dtype, bfloat16",
            "tokens: dtype, complex64",
            "tokens: dtype, float32",
        ],
        "inconsistent sizes are accepted": [
            "tokens: shape, extra axis in front",
            "tokens: shape, extra axis behind",
            "tokens: shape, first axis missing",
            "tokens: shape, scalar",
        ],
        "UFuncTypeError": [
            "tokens: leaf, a string",
            "tokens: leaf, a string array",
        ],
        "TypeError": [
            "tokens: leaf, None",
            "tokens: leaf, an object",
            "tokens: leaf, an object array",
        ],
    },
    "windows": {
        "TypeError": [
            "context: count, 3.5",
            "context: count, 3.0",
            "context: count, True",
            "context: count, None",
            "context: count, '3'",
            "context: count, nan",
        ],
    },
}

KNOWN = {
    name: {what: why for why, whats in reasons.items() for what in whats}
    for name, reasons in _FOUND.items()
}
