"""LinBP: Li, Guo, Liu, Zhang, A Theoretical View of Linear Backpropagation and Its Convergence."""
