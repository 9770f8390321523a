"""Which architecture predicts music best?"""
