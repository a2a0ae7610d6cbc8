package org.gemmaedge.core

/** An error that a user can cause and mend. Its message is one sentence: what was wrong, the value seen, what to do. */
sealed class UserError(message: String) : Exception(message)

/** The input is not usable: a damaged file, another schema, a picture that is none, ids outside the vocabulary. */
class BadInput(message: String) : UserError(message)

/** The input is right, but this phone or this context has no room for it. */
class DoesNotFit(message: String) : UserError(message)

/** A file or a figure is not what the bundle promises. */
class VerificationFailed(message: String) : UserError(message)
