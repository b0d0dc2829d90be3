package org.cdcda.app;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertTrue;

import org.cdcda.app.Fakes.FakeEngine;
import org.cdcda.app.Writing.Side;
import org.cdcda.app.engine.Answer;
import org.cdcda.app.engine.Answer.End;
import org.cdcda.app.engine.Answer.Timings;
import org.cdcda.app.engine.Engine;
import org.cdcda.app.engine.EngineState.Phase;
import org.junit.Before;
import org.junit.Test;

/** An answer as it comes, and the base model's beside it. */
public class WritingTest {
    private static final Answer WHOLE = new Answer(End.COMPLETE, "", new Timings(5, 100, 4, 20));

    private final FakeEngine engine = new FakeEngine();
    private final Writing writing = new Writing(engine);

    @Before
    public void ready() {
        engine.become(Phase.READY);
    }

    @Test
    public void piecesAddUpUntilTheEnd() {
        int[] told = {0};
        writing.watch(() -> told[0]++);
        writing.write("hello", 64, 0.5, false);
        assertTrue(writing.isRunning());
        assertFalse(writing.hasBegun(Side.PERSONAL));
        engine.sink.piece("Good ");
        assertEquals("Good ", writing.text(Side.PERSONAL));
        assertNull(writing.end(Side.PERSONAL));
        engine.answer("day", WHOLE);
        assertEquals("Good day", writing.text(Side.PERSONAL));
        assertEquals(WHOLE, writing.end(Side.PERSONAL));
        assertFalse(writing.isRunning());
        assertEquals(4, told[0]);
        assertEquals(1, engine.asked.size());
        assertEquals(1, engine.asked.get(0).personal(), 0);
    }

    @Test
    public void theBaseModelIsAskedTheSameAfterwards() {
        writing.write("hello", 64, 0.5, true);
        engine.answer("mine", WHOLE);
        assertTrue(writing.isRunning());
        assertEquals(0, engine.asked.get(1).personal(), 0);
        assertEquals("hello", engine.asked.get(1).text());
        engine.answer("its", WHOLE);
        assertFalse(writing.isRunning());
        assertEquals("mine", writing.text(Side.PERSONAL));
        assertEquals("its", writing.text(Side.BASE));
    }

    @Test
    public void afterAStopTheBaseModelIsNotAsked() {
        writing.write("hello", 64, 0.5, true);
        writing.stop();
        assertTrue(engine.stopped);
        engine.answer("mi", new Answer(End.STOPPED, "", Timings.NONE));
        assertFalse(writing.isRunning());
        assertEquals(1, engine.asked.size());
    }

    @Test
    public void aStopBetweenTheTwoAnswersIsHeard() {
        writing.write("hello", 64, 0.5, true);
        engine.become(Phase.READY);
        writing.stop();
        engine.sink.done(WHOLE);
        assertFalse(writing.isRunning());
        assertEquals(1, engine.asked.size());
        writing.write("again", 64, 0.5, true);
        engine.answer("mine", WHOLE);
        assertEquals(3, engine.asked.size());
    }

    @Test
    public void anOlderAnswersPiecesAreNotShown() {
        writing.write("first", 64, 0.5, false);
        Engine.Sink old = engine.sink;
        writing.write("second", 64, 0.5, false);
        old.piece("late");
        old.done(WHOLE);
        assertEquals("", writing.text(Side.PERSONAL));
        assertTrue(writing.isRunning());
    }
}
