"""Matrix products of a GPU asked of cuBLAS and cuBLASLt themselves: the libraries, what they take, and which call is made."""
