package org.cdcda.app;

import java.util.EnumMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CopyOnWriteArrayList;
import org.cdcda.app.engine.Answer;
import org.cdcda.app.engine.Engine;
import org.cdcda.app.engine.Request;

/** The answer on the writing screen, and the base model's beside it; it outlives a turned screen. Used on the main thread alone. */
public final class Writing {

    /** Who answers. */
    public enum Side {
        PERSONAL,
        BASE
    }

    /** Is told of every piece. */
    public interface Listener {
        void changed();
    }

    private final Engine engine;
    private final Map<Side, StringBuilder> texts = new EnumMap<>(Side.class);
    private final Map<Side, Answer> ends = new EnumMap<>(Side.class);
    private final List<Listener> watching = new CopyOnWriteArrayList<>();
    private boolean isRunning;
    private boolean isStopped;
    /** Pieces of an answer that a newer one took the place of are not shown. */
    private int turn;

    public Writing(Engine engine) {
        this.engine = engine;
        for (Side side : Side.values()) {
            texts.put(side, new StringBuilder());
        }
    }

    public void watch(Listener listener) {
        watching.add(listener);
    }

    public void unwatch(Listener listener) {
        watching.remove(listener);
    }

    /** Returns what a side has answered so far. */
    public String text(Side side) {
        return texts.get(side).toString();
    }

    /** Returns how a side's answer ended, or null while it goes on or before it began. */
    public Answer end(Side side) {
        return ends.get(side);
    }

    public boolean isRunning() {
        return isRunning;
    }

    /** Whether a side was asked at all. */
    public boolean hasBegun(Side side) {
        return ends.get(side) != null || texts.get(side).length() > 0;
    }

    /**
     * Asks.
     *
     * @param text the user's turn, the instruction included
     * @param tokens of an answer at most
     * @param temperature 0 for the most likely one
     * @param compare whether the base model is asked afterwards
     */
    public void write(String text, int tokens, double temperature, boolean compare) {
        turn++;
        for (Side side : Side.values()) {
            texts.get(side).setLength(0);
        }
        ends.clear();
        isRunning = true;
        isStopped = false;
        ask(Side.PERSONAL, new Request(text, tokens, temperature, 1), compare, turn);
        tell();
    }

    /** Ends what is being written. */
    public void stop() {
        isStopped = true; // the engine hears nothing of it between the two answers
        engine.stop();
    }

    private void ask(Side side, Request request, boolean more, int mine) {
        engine.generate(request, new Engine.Sink() {
            @Override
            public void piece(String text) {
                if (mine == turn) {
                    texts.get(side).append(text);
                    tell();
                }
            }

            @Override
            public void done(Answer answer) {
                if (mine != turn) {
                    return;
                }
                ends.put(side, answer);
                boolean goesOn = more && !isStopped && (answer.end() == Answer.End.COMPLETE || answer.end() == Answer.End.CUT);
                isRunning = goesOn;
                if (goesOn) {
                    ask(Side.BASE, new Request(request.text(), request.tokens(), request.temperature(), 0), false, mine);
                }
                tell();
            }
        });
    }

    private void tell() {
        for (Listener listener : watching) {
            listener.changed();
        }
    }
}
