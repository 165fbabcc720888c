"""Knowledge distillation: clients and the server teach each other by predictions on a public set."""
