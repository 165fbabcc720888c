"""How clients step along their gradients: one file per optimizer."""
