"""tokencredit: which tokens deserve the credit?"""
