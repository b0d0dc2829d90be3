package org.cdcda.app.engine;

/**
 * A question.
 *
 * @param text the user's turn, the task's instruction included
 * @param tokens of the answer at most
 * @param temperature 0 for the most likely answer
 * @param personal how much of the adapter is applied, 0 for the base and 1 for the person; without effect on a merged model
 */
public record Request(String text, int tokens, double temperature, double personal) {}
